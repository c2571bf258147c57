"""F0 usage: how many tokens a request asks for, and how many it used.

Before: `reserved`. While the answer passes: `Meter`, which estimates, and `UsageStripper`, which
hides what only we asked for. After its last byte: `usage_of`, which reads what the upstream says.
"""

from proxy.usage.meter import Meter
from proxy.usage.reading import usage_of
from proxy.usage.reservation import reserved
from proxy.usage.stripper import UsageStripper
from proxy.usage.words import Endpoint, Usage

__all__ = ["Endpoint", "Meter", "Usage", "UsageStripper", "reserved", "usage_of"]
