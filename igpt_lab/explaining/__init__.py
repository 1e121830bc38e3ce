"""Why a layer is good: what it says about pixels, what its parts do, where it looks, and what each position knows."""
