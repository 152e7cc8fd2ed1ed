"""Training of smaller models: the only part of the project that needs torch, which the extra `train` brings."""

from wire.errors import ConfigError

try:
    import torch  # noqa: F401  # whoever imports a module of this package learns here that it is missing
except ModuleNotFoundError as error:
    raise ConfigError("training needs torch, which is not installed: pip install 'amperage[train]'") from error
