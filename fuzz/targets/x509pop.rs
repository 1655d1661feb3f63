//! Both halves of x509pop: what a node sends to the server, and what a server sends to a node.
#![no_main]

use fuzz::{BUNDLE, OTHER, ROOT, halves, now, trust_domain};
use libfuzzer_sys::fuzz_target;
use spiffe::attest::path_template::PathTemplate;
use spiffe::attest::x509pop::{Challenge, FIELDS, NONCE_SIZE, Node, Payload, Policy, Response};

fuzz_target!(|data: &[u8]| {
    let (first, second) = halves(data);
    if let Ok(payload) = Payload::from_json(first) {
        examine(&payload, second);
    }
    // A certificate that the roots have signed, whatever it says.
    examine(&Payload { certificates: vec![ROOT.certify(first).to_vec()] }, second);
    if let Ok(challenge) = Challenge::from_json(data) {
        let _ = challenge.to_json();
    }
});

fn examine(payload: &Payload, response: &[u8]) {
    let Ok(node) = Node::verify(payload, &BUNDLE.x509, Policy::default(), now()) else { return };
    let _ = node.selectors(&trust_domain());
    for template in ["/{{ .PluginName }}/{{ .Fingerprint }}", "/{{ .Subject.CommonName }}", "/{{ .URISanSelectors.a }}"] {
        let template = PathTemplate::parse(template, FIELDS).expect("a good template");
        if let Ok(id) = node.agent_id(&trust_domain(), &template) {
            assert!(id.is_agent(), "{id} is no agent");
        }
        if let Ok(id) = node.agent_id_of_svid(&trust_domain(), &template, "/spire-exchange/") {
            assert!(id.is_agent(), "{id} is no agent");
        }
    }
    let Ok(challenge) = node.challenge([7; NONCE_SIZE]) else { return };
    if let Ok(response) = Response::from_json(response) {
        let known = node.leaf().spki_der == OTHER.spki();
        assert!(node.check(&challenge, &response).is_err() || known, "a proof without the key");
    }
}
