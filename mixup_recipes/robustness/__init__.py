"""What is done to pictures to see how a trained network bears it: corruptions, attacks, occlusion."""
