"""What ``bench --methods`` times: methods of the registry on their layers, and those of the residual stream alone."""
