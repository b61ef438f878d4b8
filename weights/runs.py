"""Load runs of this project: from a saved configuration and tensors to a model in eval mode."""

import torch

from weights.files import WeightsError, fill, name_of, read

# Options of older versions, and the only value with which a run can still be loaded.
REMOVED = {
    "VideoMAE": {"space_time": "joint"},
    "VideoClassifier": {"space_time": "joint", "pool": "mean"},
    "VideoCLIP": {"masked_text": False},
}


def load_run(make, source, model, command):
    """Load the model of a run, in eval mode.

    make     function of the configuration (config.json) that builds the model, as X.from_config
    source   path of the run's folder or of its model.safetensors
    model    the value that "model" must have in the configuration
    command  stage of train.py that writes such runs, for the message
    raises   WeightsError: another kind of file, a wrong configuration, or tensors that do not fit
    """
    tensors, config = read(source)
    kind = config.get("model")
    if kind != model:
        content = f"it holds {kind}" if config else "it has no configuration"
        raise WeightsError(f"{name_of(source)}: not a run of `train.py {command}`: {content}, "
                           f"not {model}")
    return rebuild(make, tensors, config, name_of(source))


def rebuild(make, tensors, config, name):
    """Build a model from its configuration and fill it with tensors that have our names."""
    return fill(build(make, config, name), tensors, name=name).eval()


def build(make, config, name):
    """make(config), a model. WeightsError if the configuration is wrong.

    name  of the file, for the message
    """
    try:
        return make(without_removed(config, name))
    except WeightsError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
            RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise  # the file is not the cause
        raise WeightsError(f"{name}: its configuration describes no model that can be built "
                           f"({type(error).__name__}: {str(error)[:120]})") from error


def without_removed(config, name):
    """The configuration, also of the models inside it, without removed options.

    raises  WeightsError: a removed option has a value that is no longer supported
    """
    if isinstance(config, list):
        return [without_removed(part, name) for part in config]
    if not isinstance(config, dict):
        return config
    kind = config.get("model")
    removed = REMOVED.get(kind, {}) if isinstance(kind, str) else {}
    for key, value in removed.items():
        if config.get(key, value) != value:
            raise WeightsError(f"{name}: {kind} with {key}={config[key]!r}; this option was "
                               f"removed, and only {value!r} can still be loaded")
    return {key: without_removed(value, name) for key, value in config.items()
            if key not in removed}
