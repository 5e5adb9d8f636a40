"""Acting in environments: rollouts, the backends that act, evaluation."""
