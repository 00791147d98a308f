"""How pictures and noise are mixed, and photos brought back to noise."""
