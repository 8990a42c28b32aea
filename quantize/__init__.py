"""Graph → graph: calibration and INT8 / FP16 rewriting of ONNX files; no torch."""
