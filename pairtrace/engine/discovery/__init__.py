"""Discovery: groups of prompts or pairs that training moved alike, found without naming a behaviour first."""
