"""The two verbs of this package, under one name."""

from codec.decoder import decode_pack
from codec.encoder import EncodedPack, PlaneFigures, encode_pack

__all__ = ["EncodedPack", "PlaneFigures", "decode_pack", "encode_pack"]
