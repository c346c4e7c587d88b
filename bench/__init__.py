"""titus-py beside the floor, nginx, haproxy, stunnel and hitch, in one run: ``make bench``."""
