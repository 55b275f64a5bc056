"""Preference training: DPO of a checkpoint on a preference data set, on the tokens that extraction reads."""
