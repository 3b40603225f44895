/** Ties session, connection and board together. */

import { connect } from "/realtime/client.js";
import * as api from "./api.js";
import { $, element, hue, icon, showNode, toast } from "./dom.js";
import { COLOURS, Notes } from "./notes.js";
import { Panel } from "./panel.js";
import { People } from "./people.js";

const BOARD = "board:lobby";
const LIVE = "live:lobby";
const PULSE_EVERY = 1000; // ms

const notes = new Notes();
const people = new People();
const panel = new Panel();
let client = null;
let user = null;
let leaving = false; // this window itself signs out: it shows no explanation
let redis = null; // whether the node of our socket has Redis; null while that is unknown
let pulseTimer = null;

// Session

async function start() {
  try {
    enter(await api.me());
  } catch (error) {
    gate(error.message);
  }
}

function enter({ user: name, node }) {
  showNode($("page-node"), node);
  showNode($("gate-node"), node);
  if (name === null) {
    gate();
    return;
  }
  if (user !== null && user !== name) notes.clear(); // drafts of another user are not shown to this one
  user = name;
  people.me = name;
  $("gate").hidden = $("lock").hidden = true;
  $("page").inert = false;
  document.title = `${name} · The Board`;
  open();
}

function gate(message = "") {
  $("lock").hidden = true;
  $("gate").hidden = false;
  $("gate-error").textContent = message;
  $("page").inert = true;
  document.title = "The Board · asgi-cluster";
  $("name").focus();
}

function lock(reason) {
  const time = new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  $("lock-text").textContent = `${reason || "The session has ended"}, at ${time}. The board is safe; your seat is kept warm.`;
  $("lock").hidden = false;
  $("page").inert = true;
  document.title = "Locked · The Board";
  $("again").focus();
}

$("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.submitter ?? $("sign-in").querySelector("button");
  button.disabled = true;
  $("gate-error").textContent = "";
  try {
    enter(await api.login($("name").value));
  } catch (error) {
    $("gate-error").textContent = error.message;
  } finally {
    button.disabled = false;
  }
});

$("sign-out").addEventListener("click", async () => {
  leaving = true;
  try {
    const { sockets_closed: sockets, nodes, milliseconds } = await api.logout();
    close();
    notes.clear();
    gate();
    toast(`Signed out: ${sockets} ${sockets === 1 ? "socket" : "sockets"} closed on ${nodes} nodes in ${milliseconds} ms.`, 6000);
  } catch (error) {
    toast(error.message);
  } finally {
    leaving = false;
  }
});

/** Windows share their cookie: another one may have signed in meanwhile. */
async function again() {
  try {
    const me = await api.me();
    if (me.user !== null) enter(me);
    else gate();
  } catch (error) {
    toast(error.message);
  }
}
$("again").addEventListener("click", again);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !$("lock").hidden) {
    api.me().then((me) => { if (me.user !== null && !$("lock").hidden) enter(me); }, () => {});
  }
});

// Connection

function open() {
  close();
  client = connect(undefined, { maxDelay: 3_000 }); // a demo has few windows: their reconnects need not be spread out
  client.on("state", ({ state }) => {
    redis = null;
    showState(state);
    if (state !== "connected") return;
    void pulse();
    void whoAmI();
  });
  client.on("logout", ({ reason }) => {
    close();
    if (!leaving) lock(reason);
  });
  client.on("error", ({ error }) => console.warn(error.message));
  showState(client.state);

  const board = client.subscribe(BOARD, {
    subscribed: ({ recovered }) => {
      if (!recovered) void notes.load();
      void whoIsHere(board);
    },
    publication: ({ data, info, recovered }) => {
      // Only the server puts changes here without a sender; what people publish themselves does not change the board.
      if (!info) notes.changed(data);
      else if (data?.type === "heart" && !recovered) heart(info.user);
    },
    join: ({ info }) => people.joined(info),
    leave: ({ info }) => people.left(info),
    unsubscribed: ({ error }) => {
      if (error) toast(`The board is closed: ${error.message}.`);
    },
  });

  const live = client.subscribe(LIVE, {
    publication: ({ data, info }) => {
      if (!info || info.client === client?.id) return;
      if (data?.type === "drag") notes.dragged(data, info.user);
      else if (data?.type === "pointer") people.pointer(data, info);
    },
  });
  notes.live = (data) => { if (people.company) live.latest(data, { key: data.id, interval: 60 }); };
}

function close() {
  client?.disconnect();
  client = null;
  notes.live = null;
  people.clear();
  panel.show(false);
  showState("disconnected");
}

async function whoAmI() {
  // The cookie may have changed: another window may have signed in as another person.
  const me = await api.me().catch(() => null);
  if (!me?.user) return;
  user = people.me = me.user;
  document.title = `${user} · The Board`;
  showNode($("page-node"), me.node);
}

async function whoIsHere(board) {
  try {
    people.replace(await board.presence());
  } catch {
    // The list of before is better than an empty row: joins and leaves still update it.
    people.joined({ client: client?.id ?? "me", user });
  }
}

/** The socket can be fine while its node has lost Redis. Then nothing reaches the other nodes, and nothing is live. */
async function pulse() {
  clearTimeout(pulseTimer);
  const asked = client;
  if (asked?.state !== "connected") return;
  const id = asked.id;
  const live = await asked.rpc("pulse").then((answer) => answer.live, () => false);
  if (asked !== client || asked.id !== id) return; // there is another connection by now, which makes its own call
  redis = live;
  showState(asked.state);
  pulseTimer = setTimeout(() => void pulse(), PULSE_EVERY);
}

function showState(connection) {
  const state = connection !== "connected" || redis ? connection : redis === null ? "connecting" : "stalled";
  const words = { connected: "live", connecting: "connecting…", stalled: "no Redis", disconnected: "offline" };
  const hints = { stalled: "This node cannot reach Redis: changes cannot be saved or shown until it can" };
  $("connection").dataset.state = state;
  $("connection").title = hints[state] ?? "";
  $("connection").lastElementChild.textContent = words[state];
  showNode($("socket-node"), client?.node?.replace(/-[^-]+-[^-]+$/, "") ?? null);
}

// Hearts

$("heart").addEventListener("click", () => {
  client?.publish(BOARD, { type: "heart" }).catch((error) => toast(error.message));
});

function heart(name) {
  if ($("board").querySelectorAll(".heart").length > 20) return;
  const shown = element("div", { className: "heart" }, icon("heart"), element("small", {}, name === user ? "you" : name));
  shown.style.setProperty("--left", `${15 + Math.random() * 70}%`);
  shown.style.setProperty("--hue", hue(name));
  shown.addEventListener("animationend", () => shown.remove());
  $("board").append(shown);
}

$("board").addEventListener("pointermove", ({ clientX, clientY, pointerType }) => {
  if (!people.company || pointerType !== "mouse") return;
  const area = $("cursors").getBoundingClientRect();
  client?.latest(LIVE, { type: "pointer", x: (clientX - area.left) / area.width, y: (clientY - area.top) / area.height }, { key: "pointer", interval: 80 });
});

for (const colour of COLOURS) {
  const radio = element("input", { type: "radio", name: "colour", value: colour, checked: colour === COLOURS[0], "aria-label": colour });
  const label = element("label", { title: colour }, radio);
  label.dataset.colour = colour;
  $("colours").append(label);
}
$("adder").addEventListener("submit", (event) => {
  event.preventDefault();
  notes.add();
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input[type=text], input:not([type]), textarea");
  if (event.key !== "n" || typing || event.ctrlKey || event.metaKey || event.altKey || $("page").inert) return;
  event.preventDefault();
  notes.add();
});

void start();
