"""Parameter-efficient fine-tuning: adapters over frozen weights, in PEFT's file format."""
