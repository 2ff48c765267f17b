"""Question sets of other programs, EvalScope and lm-evaluation-harness, asked at an endpoint and reported like ours."""
