"""Features of pictures by pretrained networks: the targets of REPA, and what small scores are made of."""

from typing import TYPE_CHECKING

from megadit.lazy import exports

if TYPE_CHECKING:
    from megadit.data.features.encoder import FeatureEncoder
    from megadit.data.features.targets import TargetFeatures, build_encoder, check_features

__all__ = ["FeatureEncoder", "TargetFeatures", "build_encoder", "check_features"]

__getattr__ = exports(
    __name__,
    {**dict.fromkeys(("TargetFeatures", "build_encoder", "check_features"), "targets"), "FeatureEncoder": "encoder"},
)
