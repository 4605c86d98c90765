"""One module a model, named after its Hugging Face `model_type`; each exports `ENTRY`."""
