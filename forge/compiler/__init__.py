"""Compiling any ONNX model ahead of time: constants folded, loops unrolled, nodes merged that onnxruntime does not."""
