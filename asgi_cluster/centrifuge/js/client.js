/**
 * The browser's side of asgi-cluster: one ES module without dependencies.
 *
 *     import { connect } from "/realtime/client.js";
 *     const client = connect();
 *     client.on("logout", ({ reason }) => …);
 *     client.subscribe("news:python", { publication: ({ data }) => … });
 *
 * It speaks the Centrifuge client protocol in JSON: newline-joined commands with an id, replies with that id, pushes without one,
 * `{}` as ping and pong. Where a room has history, a subscription that comes back asks for what it missed; `subscribed` says
 * whether it got all of it.
 */

/** Close codes with a meaning of their own. */
export const LOGGED_OUT = 4501;
export const SESSION_EXPIRED = 4502;

/** Codes of `ClusterError`: the server's (100 to 112), and those of this module, which are strings. */
export const ErrorCode = Object.freeze({
  INTERNAL: 100,
  UNAUTHORIZED: 101,
  UNKNOWN_ROOM: 102,
  PERMISSION_DENIED: 103,
  METHOD_NOT_FOUND: 104,
  ALREADY_SUBSCRIBED: 105,
  LIMIT_EXCEEDED: 106,
  BAD_REQUEST: 107,
  NOT_AVAILABLE: 108,
  TOKEN_EXPIRED: 109,
  EXPIRED: 110,
  TOO_MANY_REQUESTS: 111,
  UNRECOVERABLE_POSITION: 112,
  TIMEOUT: "timeout",
  CONNECTION_LOST: "connection-lost",
  DISCONNECTED: "disconnected",
  UNSUBSCRIBED: "unsubscribed",
  QUEUE_FULL: "queue-full",
  TOO_BIG: "too-big",
  TOKEN: "token",
});

/** Something that was asked for did not happen, or its outcome is unknown (`outcomeUnknown`). */
export class ClusterError extends Error {
  constructor(code, message, { temporary = false, outcomeUnknown = false, cause } = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "ClusterError";
    this.code = code;
    this.temporary = temporary;
    this.outcomeUnknown = outcomeUnknown;
  }
}

const DEFAULTS = Object.freeze({
  /** Milliseconds: the longest first wait before a reconnect, and the longest of all. Waits are drawn from 0 up (full jitter). */
  minDelay: 500,
  maxDelay: 20_000,
  /** Milliseconds for a command's reply, the time it waits for a connection included. */
  timeout: 5_000,
  /** Milliseconds that a ping of the server may be late before the connection counts as dead. */
  pingGrace: 10_000,
  /** Commands that may wait while there is no connection; one more is refused. */
  maxQueue: 100,
  /** Characters in one frame. The server closes the connection on frames above its `max_message_bytes`. */
  maxFrame: 60_000,
  /** A token of the app's own, or a function (may be async) that fetches one; asked again when it expires. */
  token: "",
  /** Sent along with connect: a JSON value, or a function (may be async) that makes it. */
  data: undefined,
  name: "asgi-cluster",
  WebSocket: undefined,
});

/** 3500–3999 and 4500–4999: the server does not want this client back. 1009: it would send the same frame again. */
function isTerminal(code) {
  return code === 1009 || (code >= 3500 && code < 4000) || (code >= 4500 && code < 5000);
}

/** The endpoint serves this line with `true`: only then is the socket beside the module. */
const FROM_ENDPOINT = false;

/** `websocket` beside this module when an endpoint served it; else, as in a bundle, `/realtime/websocket` of the page's origin. */
function defaultUrl() {
  // In two steps: bundlers take a `new URL` of a literal and import.meta.url for the name of a file.
  const module = import.meta.url;
  const origin = globalThis.location?.origin ?? "null";
  if (!FROM_ENDPOINT && !origin.startsWith("http")) {
    throw new TypeError("there is no page whose origin could be the server: pass the URL of the WebSocket");
  }
  const url = FROM_ENDPOINT ? new URL("websocket", module) : new URL("/realtime/websocket", origin);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return url.href;
}

const CLIENT_EVENTS = ["state", "logout", "publication", "message", "subscribed", "unsubscribed", "join", "leave", "error"];
const SUBSCRIPTION_EVENTS = ["publication", "join", "leave", "subscribed", "subscribing", "unsubscribed", "error"];

class Emitter {
  #events;
  #listeners = new Map();

  constructor(events) {
    this.#events = events;
  }

  /** Call `listener` at every `event`; returns a function that ends it. Throws a TypeError for an event that there is not. */
  on(event, listener) {
    this._check(event, listener);
    let listeners = this.#listeners.get(event);
    if (!listeners) this.#listeners.set(event, (listeners = new Set()));
    listeners.add(listener);
    return () => this.off(event, listener);
  }

  _check(event, listener) {
    if (!this.#events.includes(event)) {
      throw new TypeError(`there is no event ${JSON.stringify(event)}: the events are ${this.#events.join(", ")}`);
    }
    if (typeof listener !== "function") throw new TypeError(`a listener for ${event} is a function`);
  }

  off(event, listener) {
    this.#listeners.get(event)?.delete(listener);
  }

  /** The next `event`, as a promise. */
  once(event) {
    return new Promise((resolve) => {
      const off = this.on(event, (value) => {
        off();
        resolve(value);
      });
    });
  }

  _emit(event, value) {
    const listeners = this.#listeners.get(event);
    if (!listeners?.size) return false;
    for (const listener of [...listeners]) {
      try {
        listener(value);
      } catch (error) {
        // A listener's mistake is the page's to see, and must not stop the reading of the frame it came in.
        if (typeof reportError === "function") reportError(error);
        else queueMicrotask(() => { throw error; });
      }
    }
    return true;
  }
}

/** One room. Made by `client.subscribe(room)`; comes back by itself after a reconnect until `unsubscribe()`. */
export class Subscription extends Emitter {
  #client;
  #state = "subscribing";
  #position = null; // { offset, epoch } in rooms with history
  #attempts = 0;
  #timer = null;
  #generation = 0;

  constructor(client, room, options) {
    super(SUBSCRIPTION_EVENTS);
    this.#client = client;
    this.room = room;
    this.data = options.data;
  }

  /** "subscribing", "subscribed" or "unsubscribed". */
  get state() {
    return this.#state;
  }

  /** Resolves when subscribed; rejects when the subscription ends for good first. */
  ready() {
    if (this.#state === "subscribed") return Promise.resolve();
    if (this.#state === "unsubscribed") return Promise.reject(new ClusterError(ErrorCode.UNSUBSCRIBED, "unsubscribed"));
    return new Promise((resolve, reject) => {
      const settle = (act) => (value) => {
        offs.forEach((off) => off());
        act(value);
      };
      const offs = [
        this.on("subscribed", settle(() => resolve())),
        this.on("unsubscribed", settle(({ error, reason }) =>
          reject(error ?? new ClusterError(ErrorCode.UNSUBSCRIBED, reason)))),
      ];
    });
  }

  publish(data) {
    return this.#client.publish(this.room, data);
  }

  history(options) {
    return this.#client.history(this.room, options);
  }

  presence() {
    return this.#client.presence(this.room);
  }

  presenceStats() {
    return this.#client.presenceStats(this.room);
  }

  latest(data, options) {
    this.#client.latest(this.room, data, options);
  }

  /** Leave for good. A later `client.subscribe(room)` starts afresh. */
  unsubscribe() {
    if (this.#state === "unsubscribed") return;
    this.#client._forget(this, { tell: true });
    this.#end({ code: 0, reason: "unsubscribe called" });
  }

  // What the client calls

  /** The connection stands: subscribe, and go on from the last position if there is one. */
  _start() {
    this.#cancelRetry();
    const generation = ++this.#generation;
    const subscribe = { channel: this.room };
    if (this.data !== undefined) subscribe.data = this.data;
    if (this.#position) Object.assign(subscribe, { recover: true, ...this.#position });
    this.#client._call(
      { subscribe },
      (reply) => {
        if (generation === this.#generation) this.#subscribed(reply.subscribe ?? {});
      },
      (error) => {
        if (generation === this.#generation) this.#refused(error);
      },
    );
  }

  #refused(error) {
    if (error.code === ErrorCode.CONNECTION_LOST) return; // the next connection starts it again
    const generation = this.#generation;
    if (!this._emit("error", error)) this.#client._report(error, this.room);
    if (error.code === ErrorCode.UNRECOVERABLE_POSITION) this.#position = null;
    if (error.code === ErrorCode.TIMEOUT) {
      // A slow rule of the app may permit it yet: a second subscribe on this connection would then be refused for good (105).
      // A listener may have unsubscribed or disconnected.
      if (generation === this.#generation) this.#client._startOver("no reply to a subscribe in time");
      return;
    }
    const again = [ErrorCode.TOKEN_EXPIRED, ErrorCode.UNRECOVERABLE_POSITION];
    if (error.temporary || again.includes(error.code)) {
      this.#retry();
    } else {
      this.#client._forget(this);
      this.#end({ code: error.code, reason: error.message, error });
    }
  }

  #subscribed(result) {
    this.#state = "subscribed";
    this.#attempts = 0;
    const wasRecovering = Boolean(result.was_recovering ?? this.#position);
    const recovered = Boolean(result.recovered);
    const publications = result.publications ?? [];
    // Before the events: a listener that unsubscribes or reconnects must find the position as it will be.
    const positioned = Boolean(result.recoverable || result.positioned);
    this.#position = positioned ? { offset: result.offset ?? 0, epoch: result.epoch ?? "" } : null;
    this._emit("subscribed", { room: this.room, recovered, wasRecovering, data: result.data });
    for (const publication of publications) this.#publication(publication, true);
  }

  /** The connection is gone: wait for the next one. */
  _lost() {
    if (this.#state === "unsubscribed") return;
    this.#generation += 1;
    this.#cancelRetry();
    if (this.#state !== "subscribing") {
      this.#state = "subscribing";
      this._emit("subscribing", { room: this.room });
    }
  }

  #end(context) {
    this.#state = "unsubscribed";
    this.#generation += 1;
    this.#cancelRetry();
    this._emit("unsubscribed", { room: this.room, ...context });
  }

  _push(push) {
    if (push.unsubscribe) {
      const { code = 0, reason = "" } = push.unsubscribe;
      if (code >= 2500) {
        this._lost();
        this._start();
      } else {
        this.#client._forget(this);
        this.#end({ code, reason });
      }
      return;
    }
    if (this.#state !== "subscribed") return;
    if (push.pub) {
      if (this.#position && push.pub.offset) this.#position.offset = push.pub.offset;
      this.#publication(push.pub, false);
    } else if (push.join) {
      this._emit("join", { room: this.room, info: push.join.info ?? {} });
    } else if (push.leave) {
      this._emit("leave", { room: this.room, info: push.leave.info ?? {} });
    }
  }

  #publication(publication, recovered) {
    this.#client._publication(publicationOf(this.room, publication, recovered), this);
  }

  #retry() {
    this.#cancelRetry();
    this.#timer = setTimeout(() => {
      if (this.#client.state === "connected" && this.#state === "subscribing") this._start();
    }, this.#client._delay(this.#attempts++));
  }

  #cancelRetry() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }
}

function publicationOf(room, { data, info, offset, tags, time }, recovered = false) {
  return { room, data, info, offset, tags, time, recovered };
}

/** One connection to the cluster, to whichever node answers; it moves to another when that one is gone. */
export class ClusterClient extends Emitter {
  #url;
  #options;
  #socket = null;
  #state = "disconnected";
  #attempts = 0;
  #attempt = 0; // grows with every try, so that what a superseded one still brings is ignored
  #reconnectTimer = null;
  #nextId = 1;
  #pending = new Map(); // id -> { resolve, reject, timer }
  #waiting = new Set(); // commands for the next connection: { command, resolve, reject, timer }
  #batch = [];
  #subscriptions = new Map();
  #serverRooms = new Map(); // rooms that the server subscribed us to: room -> position or null
  #latest = new Map();
  #ping = 0;
  #pong = false;
  #lastHeard = 0;
  #pingTimer = null;
  #refreshTimer = null;
  #said = null; // a disconnect push: why the server is about to close
  #watched = [];

  constructor(url = defaultUrl(), options = {}) {
    super(CLIENT_EVENTS);
    for (const name of Object.keys(options)) {
      if (!(name in DEFAULTS)) throw new TypeError(`ClusterClient has no option ${name}`);
    }
    this.#url = String(url);
    this.#options = { ...DEFAULTS, ...options };
    this.id = null;
    this.node = null;
    this.data = undefined;
  }

  /** "disconnected", "connecting" or "connected". */
  get state() {
    return this.#state;
  }

  get url() {
    return this.#url;
  }

  /** Connect, and stay connected until `disconnect()` or until the server says that we shall not come back. */
  connect() {
    if (this.#state !== "disconnected") return this;
    this.#attempts = 0;
    this.#watchPage();
    this.#become("connecting", { code: 0, reason: "connect called" });
    for (const subscription of this.#subscriptions.values()) subscription._lost();
    void this.#open();
    return this;
  }

  disconnect() {
    if (this.#state !== "disconnected") this.#stop({ code: 0, reason: "disconnect called" });
  }

  /** Resolves when connected; rejects when the client is disconnected for good first. */
  ready() {
    if (this.#state === "connected") return Promise.resolve();
    if (this.#state === "disconnected") return Promise.reject(new ClusterError(ErrorCode.DISCONNECTED, "not connected"));
    return new Promise((resolve, reject) => {
      const off = this.on("state", ({ state, reason }) => {
        if (state === "connecting") return;
        off();
        if (state === "connected") resolve();
        else reject(new ClusterError(ErrorCode.DISCONNECTED, reason || "disconnected"));
      });
    });
  }

  /**
   * Enter a room; the same room gives the same subscription. `handlers` by event name:
   * publication, join, leave, subscribed, subscribing, unsubscribed, error. `data` goes to the room's rule.
   */
  subscribe(room, handlers = {}) {
    const { data, ...listeners } = handlers;
    let subscription = this.#subscriptions.get(room);
    const isNew = !subscription;
    if (isNew) subscription = new Subscription(this, room, { data });
    // All before the first: a mistake in one leaves nothing behind.
    for (const [event, listener] of Object.entries(listeners)) subscription._check(event, listener);
    for (const [event, listener] of Object.entries(listeners)) subscription.on(event, listener);
    if (isNew) this.#subscriptions.set(room, subscription);
    if (isNew && this.#state === "connected") subscription._start();
    return subscription;
  }

  /** The subscription to `room`, if there is one. */
  subscription(room) {
    return this.#subscriptions.get(room);
  }

  async publish(room, data) {
    await this.#request({ publish: { channel: room, data } });
  }

  async rpc(method, data) {
    return (await this.#request({ rpc: { method, data } })).rpc?.data;
  }

  /** A message to the app, without a reply. Waits for the connection; rejects when none comes in time. */
  async send(data) {
    await this.#whenConnected({ send: { data } });
  }

  /** `limit` 0 gives the position alone, negative all; `since` is a position; `reverse` gives the newest first. */
  async history(room, { limit = 0, since, reverse = false } = {}) {
    const { history = {} } = await this.#request({ history: { channel: room, limit, since, reverse } });
    return {
      publications: (history.publications ?? []).map((publication) => publicationOf(room, publication)),
      offset: history.offset ?? 0,
      epoch: history.epoch ?? "",
    };
  }

  /** Who is in the room: a Map from connection id to { user, client, conn_info }. */
  async presence(room) {
    const { presence } = await this.#request({ presence: { channel: room } });
    return new Map(Object.entries(presence?.presence ?? {}));
  }

  async presenceStats(room) {
    const { presence_stats: stats } = await this.#request({ presence_stats: { channel: room } });
    return { clients: stats?.num_clients ?? 0, users: stats?.num_users ?? 0 };
  }

  /**
   * Publish something that only counts until the next of its kind: a cursor, a drag. Of the values for one `key` the last goes out,
   * at most one every `interval` milliseconds and one at a time, so that a slow connection gets fewer and not a queue.
   * While there is no connection they are dropped.
   */
  latest(room, data, { key = "", interval = 50 } = {}) {
    const name = JSON.stringify([room, key]);
    let slot = this.#latest.get(name);
    if (!slot) this.#latest.set(name, (slot = { value: undefined, has: false, busy: false }));
    slot.value = data;
    slot.has = true;
    if (slot.busy) return;
    slot.busy = true;
    void (async () => {
      try {
        while (slot.has) {
          slot.has = false;
          if (this.#state !== "connected") break;
          const sent = this.#ask({ publish: { channel: room, data: slot.value } });
          await Promise.all([sent.catch((error) => this.#unlessLost(error, room)), pause(interval)]);
        }
      } finally {
        slot.busy = false;
        this.#latest.delete(name);
      }
    })();
  }

  // For subscriptions

  _forget(subscription, { tell = false } = {}) {
    if (this.#subscriptions.get(subscription.room) !== subscription) return;
    this.#subscriptions.delete(subscription.room);
    if (tell && this.#state === "connected") {
      this.#ask({ unsubscribe: { channel: subscription.room } }).catch((error) => this.#unlessLost(error, subscription.room));
    }
  }

  _publication(publication, subscription) {
    subscription?._emit("publication", publication);
    this._emit("publication", publication);
  }

  _delay(attempts) {
    const { minDelay, maxDelay } = this.#options;
    // A page in the background may take its time.
    const cap = typeof document !== "undefined" && document.hidden ? maxDelay * 3 : maxDelay;
    return Math.random() * Math.min(cap, minDelay * 2 ** Math.min(attempts, 16));
  }

  _report(error, room) {
    if (!this._emit("error", { error, room })) console.warn(`asgi-cluster: ${room ? `${room}: ` : ""}${error.message}`);
  }

  #unlessLost(error, room) {
    if (error.code !== ErrorCode.CONNECTION_LOST && error.code !== ErrorCode.DISCONNECTED) this._report(error, room);
  }

  // Commands

  /**
   * Send now, on this connection. `onReply` runs while the reply's frame is being read, before the lines that follow in it: what is
   * pushed right behind the reply to a subscribe must find the subscription standing. A promise would be a turn too late.
   */
  _call(command, onReply, onError, timeout = this.#options.timeout) {
    const id = this.#nextId++;
    try {
      this.#write({ id, ...command });
    } catch (error) {
      onError(error);
      return;
    }
    const timer = setTimeout(() => {
      this.#pending.delete(id);
      onError(new ClusterError(ErrorCode.TIMEOUT, "no reply in time", { temporary: true, outcomeUnknown: true }));
    }, timeout);
    this.#pending.set(id, { onReply, onError, timer });
  }

  #ask(command, timeout) {
    return new Promise((resolve, reject) => this._call(command, resolve, reject, timeout));
  }

  /** Send now or when the connection stands, within the timeout. */
  async #request(command) {
    const started = Date.now();
    if (this.#state !== "connected") await this.#queue();
    return this.#ask(command, Math.max(1, this.#options.timeout - (Date.now() - started)));
  }

  async #whenConnected(command) {
    if (this.#state !== "connected") await this.#queue();
    this.#write(command);
  }

  #queue() {
    if (this.#state === "disconnected") {
      return Promise.reject(new ClusterError(ErrorCode.DISCONNECTED, "not connected"));
    }
    if (this.#waiting.size >= this.#options.maxQueue) {
      return Promise.reject(new ClusterError(ErrorCode.QUEUE_FULL, "too many commands wait for a connection", { temporary: true }));
    }
    return new Promise((resolve, reject) => {
      const entry = { resolve, reject, timer: null };
      entry.timer = setTimeout(() => {
        this.#waiting.delete(entry);
        reject(new ClusterError(ErrorCode.TIMEOUT, "no connection in time", { temporary: true }));
      }, this.#options.timeout);
      this.#waiting.add(entry);
    });
  }

  /** Commands of one turn of the event loop share frames. */
  #write(command) {
    const line = JSON.stringify(command);
    if (line.length > this.#options.maxFrame) {
      throw new ClusterError(ErrorCode.TOO_BIG, `a message may have ${this.#options.maxFrame} characters`);
    }
    this.#batch.push(line);
    if (this.#batch.length === 1) queueMicrotask(() => this.#flush());
  }

  #flush() {
    const lines = this.#batch;
    this.#batch = [];
    if (this.#socket?.readyState !== 1) return; // the calls that wait for a reply fail when the connection is given up
    let frame = "";
    for (const line of lines) {
      if (frame && frame.length + line.length + 1 > this.#options.maxFrame) {
        this.#socket.send(frame);
        frame = "";
      }
      frame = frame ? `${frame}\n${line}` : line;
    }
    if (frame) this.#socket.send(frame);
  }

  // The connection

  async #open() {
    const attempt = ++this.#attempt;
    clearTimeout(this.#reconnectTimer);
    this.#reconnectTimer = null;
    let token, data;
    try {
      token = await this.#value(this.#options.token);
      data = await this.#value(this.#options.data);
    } catch (cause) {
      if (attempt !== this.#attempt) return;
      this._report(new ClusterError(ErrorCode.TOKEN, "the token could not be fetched", { temporary: true, cause }));
      this.#again();
      return;
    }
    if (attempt !== this.#attempt) return;
    const Socket = this.#options.WebSocket ?? globalThis.WebSocket;
    const socket = (this.#socket = new Socket(this.#url));
    this.#said = null;
    // A handshake may hang as long as TCP likes; the connect command has its own timeout.
    const opening = setTimeout(() => this.#lose(attempt, 0, "no connection in time"), this.#options.timeout);
    socket.onopen = () => {
      clearTimeout(opening);
      if (attempt === this.#attempt) this.#introduce(attempt, token, data);
    };
    socket.onmessage = ({ data: frame }) => {
      if (attempt === this.#attempt) this.#receive(attempt, frame);
    };
    socket.onclose = ({ code, reason }) => {
      clearTimeout(opening);
      this.#lose(attempt, this.#said?.code ?? code, this.#said?.reason ?? reason);
    };
    // An error is always followed by a close, which says more.
    socket.onerror = () => {};
  }

  async #value(given) {
    return typeof given === "function" ? given() : given;
  }

  #introduce(attempt, token, data) {
    const connect = { name: this.#options.name };
    if (token) connect.token = token;
    if (data !== undefined) connect.data = data;
    if (this.#serverRooms.size) {
      connect.subs = Object.fromEntries(
        [...this.#serverRooms].map(([room, position]) => [room, position ? { recover: true, ...position } : {}]),
      );
    }
    this._call(
      { connect },
      (reply) => {
        if (attempt === this.#attempt) this.#connected(reply.connect ?? {});
      },
      (error) => {
        if (attempt !== this.#attempt) return;
        this._report(error);
        const refreshable = error.code === ErrorCode.TOKEN_EXPIRED && typeof this.#options.token === "function";
        if (error.temporary || refreshable) this.#lose(attempt, 0, error.message);
        else this.#stop({ code: error.code, reason: error.message, error });
      },
    );
  }

  #connected(result) {
    this.id = result.client ?? null;
    this.node = result.node || null;
    this.data = result.data;
    this.#attempts = 0;
    this.#ping = (result.ping ?? 0) * 1000;
    this.#pong = Boolean(result.pong);
    this.#heard();
    if (result.expires) this.#refreshLater(result.ttl ?? 0);
    this.#become("connected", { code: 0, reason: "" });
    if (this.#state !== "connected") return; // a listener has had enough
    this.#serverSubscribed(result.subs ?? {});
    for (const subscription of this.#subscriptions.values()) {
      if (subscription.state === "subscribing") subscription._start();
    }
    for (const entry of this.#waiting) {
      clearTimeout(entry.timer);
      entry.resolve();
    }
    this.#waiting.clear();
  }

  #serverSubscribed(subs) {
    for (const room of this.#serverRooms.keys()) {
      if (!(room in subs)) this.#serverRooms.delete(room);
    }
    for (const [room, result] of Object.entries(subs)) this.#serverRoom(room, result);
  }

  #serverRoom(room, result) {
    const positioned = result.recoverable || result.positioned;
    this.#serverRooms.set(room, positioned ? { offset: result.offset ?? 0, epoch: result.epoch ?? "" } : null);
    this._emit("subscribed", {
      room,
      recovered: Boolean(result.recovered),
      wasRecovering: Boolean(result.was_recovering),
      data: result.data,
    });
    for (const publication of result.publications ?? []) this._publication(publicationOf(room, publication, true));
  }

  #receive(attempt, frame) {
    this.#heard();
    for (const line of String(frame).split("\n")) {
      if (!line.trim()) continue;
      let reply;
      try {
        reply = JSON.parse(line);
      } catch (cause) {
        // Not our protocol: what follows cannot be trusted either.
        this._report(new ClusterError(ErrorCode.BAD_REQUEST, "the server sent something that is not JSON", { cause }));
        this.#lose(attempt, 0, "bad frame");
        return;
      }
      if (reply.id) this.#reply(reply);
      else if (reply.push) this.#push(reply.push);
      else if (this.#pong && this.#socket?.readyState === 1) this.#socket.send("{}");
      if (attempt !== this.#attempt) return; // what was just handled ended this connection
    }
  }

  #reply(reply) {
    const entry = this.#pending.get(reply.id);
    if (!entry) return; // timed out before
    this.#pending.delete(reply.id);
    clearTimeout(entry.timer);
    if (reply.error) {
      const { code, message, temporary = false } = reply.error;
      entry.onError(new ClusterError(code, message || `error ${code}`, { temporary }));
    } else {
      entry.onReply(reply);
    }
  }

  #push(push) {
    if (push.disconnect) {
      this.#said = push.disconnect;
    } else if (push.message) {
      this._emit("message", { data: push.message.data });
    } else if (push.subscribe) {
      this.#serverRoom(push.channel, push.subscribe);
    } else if (this.#subscriptions.has(push.channel)) {
      this.#subscriptions.get(push.channel)._push(push);
    } else if (this.#serverRooms.has(push.channel)) {
      const position = this.#serverRooms.get(push.channel);
      if (push.pub) {
        if (position && push.pub.offset) position.offset = push.pub.offset;
        this._publication(publicationOf(push.channel, push.pub));
      } else if (push.unsubscribe) {
        this.#serverRooms.delete(push.channel);
        this._emit("unsubscribed", { room: push.channel, ...push.unsubscribe });
      } else if (push.join || push.leave) {
        this._emit(push.join ? "join" : "leave", { room: push.channel, info: (push.join ?? push.leave).info ?? {} });
      }
    }
  }

  /** This connection is given up, and another one made. */
  _startOver(reason) {
    this.#lose(this.#attempt, 0, reason);
  }

  /** This connection is over: come back, or not. */
  #lose(attempt, code, reason) {
    if (attempt !== this.#attempt) return;
    if (isTerminal(code)) {
      this.#stop({ code, reason });
      return;
    }
    this.#drop();
    this.#become("connecting", { code, reason });
    if (this.#state === "connecting") this.#again();
  }

  #again() {
    clearTimeout(this.#reconnectTimer);
    this.#reconnectTimer = setTimeout(() => {
      this.#reconnectTimer = null;
      void this.#open();
    }, this._delay(this.#attempts++));
  }

  /** Not before the next `connect()`. */
  #stop(context) {
    this.#drop();
    clearTimeout(this.#reconnectTimer);
    this.#reconnectTimer = null;
    this.#unwatchPage();
    this.#serverRooms.clear();
    for (const entry of this.#waiting) {
      clearTimeout(entry.timer);
      entry.reject(new ClusterError(ErrorCode.DISCONNECTED, context.reason || "disconnected"));
    }
    this.#waiting.clear();
    this.#become("disconnected", context);
    if (context.code === LOGGED_OUT || context.code === SESSION_EXPIRED) this._emit("logout", context);
  }

  #drop() {
    this.#attempt += 1;
    const socket = this.#socket;
    this.#socket = null;
    this.#batch = [];
    clearTimeout(this.#pingTimer);
    this.#pingTimer = null;
    this.#ping = 0;
    clearTimeout(this.#refreshTimer);
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      if (socket.readyState <= 1) socket.close();
    }
    const pending = [...this.#pending.values()];
    this.#pending.clear();
    for (const entry of pending) {
      clearTimeout(entry.timer);
      entry.onError(new ClusterError(ErrorCode.CONNECTION_LOST, "the connection was lost", { temporary: true, outcomeUnknown: true }));
    }
    for (const subscription of this.#subscriptions.values()) subscription._lost();
  }

  #become(state, { code, reason, error }) {
    const previous = this.#state;
    this.#state = state;
    if (state !== "connected") this.id = this.node = null;
    if (state !== previous || code) this._emit("state", { state, previous, code, reason, error });
  }

  // Whether it still lives

  #heard() {
    this.#lastHeard = Date.now();
    if (this.#pingTimer === null) this.#watchPings();
  }

  /** One timer that looks at the clock, not one per message. Timers of hidden pages run late, and then see what came meanwhile. */
  #watchPings() {
    if (!this.#ping) return;
    const attempt = this.#attempt;
    const patience = this.#ping + this.#options.pingGrace;
    this.#pingTimer = setTimeout(() => {
      this.#pingTimer = null;
      if (attempt !== this.#attempt) return;
      if (Date.now() - this.#lastHeard >= patience) this.#lose(attempt, 0, "no ping");
      else this.#watchPings();
    }, Math.max(0, this.#lastHeard + patience - Date.now()));
  }

  #refreshLater(ttl) {
    clearTimeout(this.#refreshTimer);
    const attempt = this.#attempt;
    // setTimeout takes 31 bits; a token that lives longer is asked for early.
    this.#refreshTimer = setTimeout(async () => {
      try {
        const token = await this.#value(this.#options.token);
        if (attempt !== this.#attempt) return;
        const { refresh = {} } = await this.#ask({ refresh: { token } });
        if (attempt === this.#attempt && refresh.expires) this.#refreshLater(refresh.ttl ?? 0);
      } catch (error) {
        if (attempt !== this.#attempt) return;
        this._report(error instanceof ClusterError ? error : new ClusterError(ErrorCode.TOKEN, "the token could not be fetched", { cause: error }));
        // Once more before the server gives up on us (3005), which then reconnects with a new token.
        if (!(error instanceof ClusterError) || error.temporary) this.#refreshLater(5);
      }
    }, Math.min(ttl * 1000, 2 ** 31 - 1));
  }

  /** The browser's online and offline events are hints: try sooner, or check the connection. */
  #watchPage() {
    if (typeof addEventListener !== "function" || this.#watched.length) return;
    const hint = () => this.#hint();
    const watch = (target, event, listener) => {
      target.addEventListener(event, listener);
      this.#watched.push(() => target.removeEventListener(event, listener));
    };
    watch(globalThis, "online", hint);
    // "offline" is no proof either: a server on this very machine stays reachable.
    watch(globalThis, "offline", hint);
    watch(globalThis, "pageshow", ({ persisted }) => { if (persisted) hint(); });
    if (typeof document !== "undefined") {
      watch(document, "visibilitychange", () => { if (!document.hidden) hint(); });
    }
  }

  #unwatchPage() {
    for (const end of this.#watched) end();
    this.#watched = [];
  }

  #hint() {
    if (this.#reconnectTimer !== null) {
      this.#attempts = 0;
      void this.#open();
    } else if (this.#state === "connected" && Date.now() - this.#lastHeard > 1_000) {
      const attempt = this.#attempt;
      // Any reply proves life, an error too. Without one the connection is dead, however open it looks.
      this.#ask({ ping: {} }).catch((error) => {
        if (error.code === ErrorCode.TIMEOUT) this.#lose(attempt, 0, "no answer");
      });
    }
  }
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** A client that is connecting already. */
export function connect(url, options) {
  return new ClusterClient(url, options).connect();
}
