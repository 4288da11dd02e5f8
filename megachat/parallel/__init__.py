"""How ranks are arranged, grouped, connected and started."""
