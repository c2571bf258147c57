"""What a relayed request and a relayed chunk cost, measured beside other proxies.

Standard library only, so that it runs in whatever environment the proxy runs in.
"""
