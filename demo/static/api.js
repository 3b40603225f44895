/** The demo's HTTP API. */

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(method, path, body) {
  const request = { method, headers: {} };
  if (body !== undefined) {
    request.headers["content-type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, request);
  } catch {
    throw new ApiError(0, "The node does not answer. Trying again may find another.");
  }
  const answer = await response.json().catch(() => ({}));
  const reason = response.status === 503 ? "Redis does not answer. Please try again." : `The server answered ${response.status}.`;
  if (!response.ok) throw new ApiError(response.status, answer.error ?? reason);
  return answer;
}

export const me = () => call("GET", "/api/me");
export const login = (name) => call("POST", "/api/login", { name });
export const logout = () => call("POST", "/api/logout");
export const stats = () => call("GET", "/api/stats");
export const readBoard = () => call("GET", "/api/board");
export const addNote = (fields) => call("POST", "/api/board/notes", fields);
export const editNote = (id, fields) => call("PATCH", `/api/board/notes/${encodeURIComponent(id)}`, fields);
export const deleteNote = (id) => call("DELETE", `/api/board/notes/${encodeURIComponent(id)}`);
