// Node's peers: `node node.cjs socketio|ws PORT REDIS_URL PREFIX`, with the packages found through NODE_PATH.
// Answers the load test's control like loadtest/target.py.
"use strict";
const http = require("node:http");
const { createClient } = require("redis");

const [kind, port, url, prefix] = process.argv.slice(2);
const MARK = "@@";
let published = 0;
let running = 0;

function message(size) {
  const now = process.hrtime.bigint().toString(); // CLOCK_MONOTONIC, as Python's
  const head = `{"m":"${MARK}","t":${now},"p":"`;
  return head + "x".repeat(Math.max(0, size - head.length - 2)) + '"}';
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function run(publish, options) {
  running += 1;
  const count = Number(options.get("count"));
  const batch = Number(options.get("batch") ?? 10);
  const size = Number(options.get("size") ?? 128);
  const gap = Number(options.get("gap") ?? 0);
  let due = performance.now();
  for (let start = 0; start < count; start += batch) {
    const number = Math.min(batch, count - start);
    await Promise.all(Array.from({ length: number }, () => publish(message(size))));
    published += number;
    due += gap;
    if (gap) await pause(Math.max(0, due - performance.now()));
    else await new Promise(setImmediate);
  }
  running -= 1;
}

function control(publish) {
  return (request, response) => {
    const address = new URL(request.url, "http://localhost");
    if (address.pathname === "/publish") run(publish, address.searchParams);
    if (address.pathname === "/collect") global.gc?.();
    response.end(JSON.stringify({ published, busy: running > 0 }));
  };
}

async function socketio(pub, sub) {
  const { Server } = require("socket.io");
  const { createAdapter } = require("@socket.io/redis-adapter");
  const server = http.createServer();
  const io = new Server(server, { adapter: createAdapter(pub, sub, { key: prefix }) });
  // Socket.IO answers its own path first and leaves the rest to this.
  server.on("request", (request, response) => {
    if (!request.url.startsWith("/socket.io/")) control(publish)(request, response);
  });
  async function publish(text) {
    io.to("load").emit("m", JSON.parse(text));
  }
  io.on("connection", async (socket) => {
    await socket.join("load");
    socket.emit("ready");
  });
  server.listen({ port, host: "127.0.0.1", backlog: 4096 });
}

async function ws(pub, sub) {
  const { WebSocketServer } = require("ws");
  const server = http.createServer(control((text) => pub.publish(prefix, text)));
  const sockets = new WebSocketServer({ server, path: "/ws", perMessageDeflate: false });
  sockets.on("connection", (socket) => socket.send("ready"));
  await sub.subscribe(prefix, (text) => {
    for (const socket of sockets.clients) if (socket.readyState === 1) socket.send(text);
  });
  server.listen({ port, host: "127.0.0.1", backlog: 4096 });
}

(async () => {
  const pub = createClient({ url });
  const sub = pub.duplicate();
  await Promise.all([pub.connect(), sub.connect()]);
  await { socketio, ws }[kind](pub, sub);
})();
