"""The stages: pairs, extraction, behaviours, scoring, ranking, planning."""
