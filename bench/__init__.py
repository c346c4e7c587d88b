"""titus-py beside nginx, haproxy, stunnel and hitch, in one run: ``make bench``."""
