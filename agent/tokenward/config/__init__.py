"""The configuration: one TOML file and what lies in `conf.d` beside it, as typed frozen sections (see `load`).

A package, where the house plan has one module: the parser alone would be three times the size that we allow one.
"""

from tokenward.config.load import load, parse
from tokenward.config.sections import (
    AppRoleLogin,
    AttestationConfig,
    Audit,
    CertLogin,
    Config,
    Environment,
    JwtLogin,
    KubernetesLogin,
    Limits,
    Listen,
    Log,
    Login,
    Signing,
    TokenLogin,
    Vault,
)

__all__ = [
    "AppRoleLogin",
    "AttestationConfig",
    "Audit",
    "CertLogin",
    "Config",
    "Environment",
    "JwtLogin",
    "KubernetesLogin",
    "Limits",
    "Listen",
    "Log",
    "Login",
    "Signing",
    "TokenLogin",
    "Vault",
    "load",
    "parse",
]
