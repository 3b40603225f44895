// Drives the npm SDK for test_centrifuge_js.py: one JSON command per line in, one JSON event per line out.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const require = createRequire(process.argv[2] + "/");
const { Centrifuge } = require("centrifuge");
const WebSocket = require("ws");

const tell = (event) => process.stdout.write(JSON.stringify(event) + "\n");
const cookie = process.argv[4] ?? "";

class WithCookie extends WebSocket {
  constructor(url, protocols) {
    super(url, protocols, cookie ? { headers: { cookie } } : {});
    WithCookie.last = this;
  }
}

const client = new Centrifuge(process.argv[3], {
  websocket: WithCookie,
  minReconnectDelay: 20,
  maxReconnectDelay: 100,
  ...(process.argv[5] ? { token: process.argv[5], getToken: async () => "new" } : {}),
});
for (const name of ["connected", "connecting", "disconnected"]) {
  client.on(name, ({ code, reason }) => tell({ event: name, code, reason }));
}
client.on("message", ({ data }) => tell({ event: "message", data }));

const commands = {
  connect: () => client.connect(),
  disconnect: () => client.disconnect(),
  cut: () => WithCookie.last.terminate(),
  subscribe({ room, options }) {
    const delays = { minResubscribeDelay: 20, maxResubscribeDelay: 100 };
    const subscription = client.newSubscription(room, { ...delays, ...options });
    subscription.on("publication", ({ data, offset, info }) =>
      tell({ event: "publication", room, data, offset, user: info?.user }));
    subscription.on("subscribed", ({ wasRecovering, recovered }) =>
      tell({ event: "subscribed", room, wasRecovering, recovered }));
    subscription.on("unsubscribed", ({ code }) => tell({ event: "unsubscribed", room, code }));
    subscription.on("join", ({ info }) => tell({ event: "join", room, user: info.user }));
    subscription.on("leave", ({ info }) => tell({ event: "leave", room, user: info.user }));
    subscription.subscribe();
  },
  publish: ({ room, data }) => client.publish(room, data),
  async rpc({ method, data }) {
    tell({ event: "rpc", ...(await client.rpc(method, data)) });
  },
  async presence({ room }) {
    const { clients } = await client.presence(room);
    tell({ event: "presence", users: Object.values(clients).map((info) => info.user) });
  },
  async history({ room, limit }) {
    const { publications } = await client.history(room, { limit });
    tell({ event: "history", data: publications.map((publication) => publication.data) });
  },
};

createInterface({ input: process.stdin })
  .on("line", async (line) => {
    const { command, ...options } = JSON.parse(line);
    try {
      await commands[command](options);
    } catch ({ code, message }) {
      tell({ event: "error", command, code, message });
    }
  })
  .on("close", () => process.exit(0));
