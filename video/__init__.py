"""Video as data: decoding, sampling, transforms, annotations, shards, the generated world."""
