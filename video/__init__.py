"""Video as data: decoding, sampling, transforms, annotation formats, shards, the generated world."""
