"""Teacher → student → graph: training, distillation and ONNX export; the only home of torch."""
