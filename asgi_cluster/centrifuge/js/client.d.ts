/** Types of `client.js`, the browser's side of asgi-cluster. */

export type State = "disconnected" | "connecting" | "connected";

/** 4501: the session was ended, here or elsewhere. */
export const LOGGED_OUT: 4501;
/** 4502: the session ran into its timeout. */
export const SESSION_EXPIRED: 4502;

export const ErrorCode: Readonly<{
  INTERNAL: 100;
  UNAUTHORIZED: 101;
  UNKNOWN_ROOM: 102;
  PERMISSION_DENIED: 103;
  METHOD_NOT_FOUND: 104;
  ALREADY_SUBSCRIBED: 105;
  LIMIT_EXCEEDED: 106;
  BAD_REQUEST: 107;
  NOT_AVAILABLE: 108;
  TOKEN_EXPIRED: 109;
  EXPIRED: 110;
  TOO_MANY_REQUESTS: 111;
  UNRECOVERABLE_POSITION: 112;
  TIMEOUT: "timeout";
  CONNECTION_LOST: "connection-lost";
  DISCONNECTED: "disconnected";
  UNSUBSCRIBED: "unsubscribed";
  QUEUE_FULL: "queue-full";
  TOO_BIG: "too-big";
  TOKEN: "token";
}>;

export class ClusterError extends Error {
  readonly name: "ClusterError";
  /** A number from the server, a string from this module; see `ErrorCode`. */
  readonly code: number | string;
  /** Whether another try makes sense. */
  readonly temporary: boolean;
  /** It was sent and no reply came: it may have happened. */
  readonly outcomeUnknown: boolean;
  constructor(
    code: number | string,
    message: string,
    options?: { temporary?: boolean; outcomeUnknown?: boolean; cause?: unknown },
  );
}

export interface ClientInfo {
  user?: string;
  client?: string;
  conn_info?: unknown;
  chan_info?: unknown;
}

export interface Position {
  offset: number;
  epoch: string;
}

export interface Publication<T = any> {
  room: string;
  data: T;
  /** Who published it; absent when the server did. */
  info?: ClientInfo;
  /** Only in rooms with history. */
  offset?: number;
  tags?: Record<string, string>;
  time?: number;
  /** True for what was missed while the connection was down. */
  recovered: boolean;
}

export interface StateChange {
  state: State;
  previous: State;
  /** The WebSocket's close code, or the code of the error; 0 when there is none. */
  code: number | string;
  reason: string;
  error?: ClusterError;
}

export interface Subscribed {
  room: string;
  /** True: nothing was missed since the last time. */
  recovered: boolean;
  /** True: this was not the first time, and the missed publications were asked for. */
  wasRecovering: boolean;
  data?: unknown;
}

export interface Unsubscribed {
  room: string;
  code: number | string;
  reason: string;
  error?: ClusterError;
}

export interface Presence {
  room: string;
  info: ClientInfo;
}

export interface ClientEvents {
  state: StateChange;
  /** The session was ended (4501) or has expired (4502): the client does not come back by itself. */
  logout: { code: number; reason: string };
  /** Of every room, those of subscriptions too. */
  publication: Publication;
  message: { data: any };
  /** Rooms that the server subscribed this client to. */
  subscribed: Subscribed;
  unsubscribed: Unsubscribed;
  join: Presence;
  leave: Presence;
  /** What no promise reports. Without a listener it goes to the console. */
  error: { error: ClusterError; room?: string };
}

export interface SubscriptionEvents<T = any> {
  publication: Publication<T>;
  join: Presence;
  leave: Presence;
  subscribed: Subscribed;
  /** The connection is gone, or the server asked to come again. */
  subscribing: { room: string };
  unsubscribed: Unsubscribed;
  error: ClusterError;
}

export type Handlers<E> = { [K in keyof E]?: (event: E[K]) => void };

export interface Options {
  /** Milliseconds: the longest first wait before a reconnect. Default 500. */
  minDelay?: number;
  /** Milliseconds: the longest wait of all. Default 20 000, three times as much while the page is hidden. */
  maxDelay?: number;
  /** Milliseconds for a command's reply, its wait for a connection included. Default 5000. */
  timeout?: number;
  /** Milliseconds that the server's ping may be late. Default 10 000. */
  pingGrace?: number;
  /** Commands that may wait for a connection. Default 100. */
  maxQueue?: number;
  /** Characters in one frame. Default 60 000. */
  maxFrame?: number;
  /** A token of the app's own, or a function that fetches one. */
  token?: string | (() => string | Promise<string>);
  /** Sent along with connect. */
  data?: unknown;
  /** The client's name, as the server sees it. */
  name?: string;
  /** For places without a global WebSocket. */
  WebSocket?: new (url: string) => WebSocket;
}

export interface HistoryOptions {
  /** 0: the position alone; negative: all. Default 0. */
  limit?: number;
  since?: Position;
  reverse?: boolean;
}

export interface History<T = any> extends Position {
  publications: Publication<T>[];
}

export interface LatestOptions {
  /** Values with different keys do not replace each other. Default `""`. */
  key?: string;
  /** Milliseconds between two sends for one key. Default 50. */
  interval?: number;
}

declare class Emitter<E> {
  /** Call `listener` at every `event`; returns a function that ends it. Throws a `TypeError` for an event that is not listed. */
  on<K extends keyof E>(event: K, listener: (event: E[K]) => void): () => void;
  off<K extends keyof E>(event: K, listener: (event: E[K]) => void): void;
  /** The next `event`. Rejects with a `TypeError` for an event that is not listed. */
  once<K extends keyof E>(event: K): Promise<E[K]>;
}

/** One room. Comes back by itself after a reconnect, until `unsubscribe()`. */
export class Subscription<T = any> extends Emitter<SubscriptionEvents<T>> {
  private constructor();
  readonly room: string;
  readonly state: "subscribing" | "subscribed" | "unsubscribed";
  ready(): Promise<void>;
  publish(data: T): Promise<void>;
  history(options?: HistoryOptions): Promise<History<T>>;
  presence(): Promise<Map<string, ClientInfo>>;
  presenceStats(): Promise<{ clients: number; users: number }>;
  latest(data: T, options?: LatestOptions): void;
  unsubscribe(): void;
}

/** One connection to the cluster, to whichever node answers. */
export class ClusterClient extends Emitter<ClientEvents> {
  /**
   * `url` defaults to `websocket` beside this module when an endpoint served it (`<path>/client.js`). A bundle or a copy of the
   * file connects to `/realtime/websocket` of the page's origin; give the URL where the endpoint has another path or host.
   */
  constructor(url?: string | URL, options?: Options);
  readonly state: State;
  readonly url: string;
  /** This connection's id; `null` while there is none. */
  readonly id: string | null;
  /** The node that holds the socket; `null` while there is none. */
  readonly node: string | null;
  /** What the server's connect hook sent along. */
  readonly data: unknown;
  connect(): this;
  disconnect(): void;
  ready(): Promise<void>;
  /** The same room gives the same subscription. `data` goes to the room's rule. */
  subscribe<T = any>(room: string, handlers?: Handlers<SubscriptionEvents<T>> & { data?: unknown }): Subscription<T>;
  subscription(room: string): Subscription | undefined;
  publish(room: string, data: unknown): Promise<void>;
  rpc<T = any>(method: string, data?: unknown): Promise<T>;
  send(data: unknown): Promise<void>;
  history<T = any>(room: string, options?: HistoryOptions): Promise<History<T>>;
  presence(room: string): Promise<Map<string, ClientInfo>>;
  presenceStats(room: string): Promise<{ clients: number; users: number }>;
  /** Publish what only counts until the next of its kind. Dropped while there is no connection. */
  latest(room: string, data: unknown, options?: LatestOptions): void;
}

/** A client that is connecting already. */
export function connect(url?: string | URL, options?: Options): ClusterClient;
