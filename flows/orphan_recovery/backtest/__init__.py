"""The backtest: which threshold? Replayed over runs that are known to have lived. Only reads."""
