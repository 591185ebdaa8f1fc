"""From pictures to latents and back: the codecs that megadit has, by the ``_class_name`` in a folder's config.json."""

from collections.abc import Mapping

CODECS: Mapping[str, str] = {
    "AutoencoderKL": "megadit.data.codecs.vae:VaeCodec",
    "PcaPatchCodec": "megadit.data.codecs.pca:PcaCodec",
}
