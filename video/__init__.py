"""Video files: decoding, sampling, transforms, annotations, shards, the generated clips."""
