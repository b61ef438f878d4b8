"""Weights of neural networks: read and written strictly, by safe files and a key map per family."""

from weights.files import (  # noqa: F401
    Rule, StandIn, TensorsOnly, WeightsError, activation, build, checksum, commonest, convert,
    depth_of, describe, fill, fingerprint, hub_config, is_program, listed, load, named, official,
    part, publish, read, save, settle, shape_of, take_out, translate, untold, unwrap,
    write_aside, write_torch, ENVELOPES, PREFIXES, DAMAGE, STORAGES, FAMILIES, PUBLISHED)
