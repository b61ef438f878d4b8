"""Video as data: decoding, frame sampling, transforms, annotation formats, shards, the generated world."""
