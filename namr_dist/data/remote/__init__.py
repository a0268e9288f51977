"""Sets that lie elsewhere: shards over the net, and a cache of them."""
