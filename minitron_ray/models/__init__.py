"""Networks on paper: sizes, tables of tensors, budgets and costs. No tensor is touched here."""
