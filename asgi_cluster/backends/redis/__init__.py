"""Redis and Valkey, in five layers. A layer uses those above it in this picture, and none below.

::

    MultiplexedConnection    one socket: commands in, replies and pushes out, in order
          |                  [connection replies address urls compat]
          |
          |                  one loop opens it, and again when it breaks, for each layer below
          |                  [reconnect]
          v
    PrimaryClient            commands to one primary, each within its timeout
          |                  [client primary]
          v
    Topology                 which primary has which key: a server, a Sentinel service, a Redis Cluster
          |                  [topology single sentinel sharded shard slots]
          v
    Subscriber               one connection to one primary: its channels, and the heartbeats of its lease
          |                  [subscriber subscriptions heartbeat quorum listener]
          v
    SubscriberSet            a subscriber and a lease for each primary, each channel at its primary
                             [subscribers registry]
"""
