"""A trained model as a folder that other programs read: safetensors, ONNX, torch.export and a model card."""
