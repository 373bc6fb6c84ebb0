"""Commands that attack, judge, verify and compare."""
