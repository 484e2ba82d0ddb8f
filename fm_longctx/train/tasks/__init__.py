"""What is learned: records, losses and adapters of pretraining, fine-tuning, preferences and rewards."""
