"""The demo: a generated multilingual world, a tiny Llama trained on it, and the whole method run over both."""
