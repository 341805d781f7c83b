-- How many rollouts of a pool run at once under a budget.

ALTER TABLE budgets ADD COLUMN places INTEGER;
