"""/rollouts: durable rollouts and the token budgets of their pools."""
