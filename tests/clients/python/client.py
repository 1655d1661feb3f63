"""A workload written with py-spiffe; ../README.md says what it prints."""

import json
import sys
import threading

from spiffe import JwtSvid, WorkloadApiClient

DEADLINE = 20.0
OUTPUT = threading.Lock()


def report(event, **members):
    with OUTPUT:
        print(json.dumps({"event": event, **members}), flush=True)


def report_x509_svids(svids):
    for svid in svids:
        leaf = svid.leaf
        report(
            "x509_svid",
            id=str(svid.spiffe_id),
            serial=str(leaf.serial_number),
            not_after=int(leaf.not_valid_after_utc.timestamp()),
        )


def report_x509_bundles(bundles):
    for bundle in bundles.bundles:
        report("x509_bundle", trust_domain=bundle.trust_domain.name, authorities=len(bundle.x509_authorities))


def report_jwt_bundles(bundles):
    for bundle in bundles.bundles:
        report("jwt_bundle", trust_domain=bundle.trust_domain.name, keys=sorted(bundle.jwt_authorities))


def once(client, audience):
    report_x509_svids(client.fetch_x509_svids(timeout=DEADLINE))
    report_x509_bundles(client.fetch_x509_bundles(timeout=DEADLINE))
    jwt = client.fetch_jwt_svid(audience={audience}, timeout=DEADLINE)
    report("jwt_svid", id=str(jwt.spiffe_id), audience=sorted(jwt.audience), expires_at=jwt.expiry)
    bundles = client.fetch_jwt_bundles(timeout=DEADLINE)
    report_jwt_bundles(bundles)
    valid = client.validate_jwt_svid(jwt.token, audience, timeout=DEADLINE)
    report("jwt_valid", id=str(valid.spiffe_id), by="agent")
    bundle = bundles.get_bundle_for_trust_domain(jwt.spiffe_id.trust_domain)
    verified = JwtSvid.parse_and_validate(jwt.token, bundle, {audience})
    report("jwt_valid", id=str(verified.spiffe_id), by="library")


def watch(client):
    def updated(context):
        report_x509_bundles(context.x509_bundle_set)
        report_x509_svids(context.x509_svids)

    def failed(error):
        report("error", text=str(error))

    streams = [
        client.stream_x509_contexts(updated, failed),
        client.stream_jwt_bundles(report_jwt_bundles, failed),
    ]
    sys.stdin.read()
    for stream in streams:
        stream.cancel()


def main(arguments):
    try:
        with WorkloadApiClient() as client:
            match arguments:
                case ["once", audience]:
                    once(client, audience)
                case ["watch"]:
                    watch(client)
                case _:
                    raise SystemExit("usage: once AUDIENCE | watch")
    except Exception as error:  # Whatever went wrong, the test wants to read it.
        report("error", text=f"{type(error).__name__}: {error}")
        return 1
    report("end")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
