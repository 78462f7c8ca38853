//! TLS ClientHellos: what rustls reads out of one, we read too; and an answer once given stays.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustls::server::Acceptor;
use weft_proxy::detect::client_hello;

/// Server name and protocols offered, when rustls takes it for a whole ClientHello.
fn theirs(mut bytes: &[u8]) -> Option<(Option<String>, Vec<Vec<u8>>)> {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        acceptor.read_tls(&mut bytes).ok()?;
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let alpn = hello
                    .alpn()
                    .map(|names| names.map(<[u8]>::to_vec).collect())
                    .unwrap_or_default();
                return Some((hello.server_name().map(str::to_owned), alpn));
            }
            Err(_) => return None,
        }
    }
    None
}

fuzz_target!(|data: &[u8]| {
    let ours = client_hello(data);
    let step = data.len() / 128 + 1;
    let mut decided = None;
    for end in (0..data.len()).step_by(step) {
        match client_hello(&data[..end]) {
            Ok(None) => assert!(decided.is_none(), "it changed its mind at {end}"),
            now => {
                let before = decided.get_or_insert_with(|| now.clone());
                assert_eq!(*before, now, "it changed its mind at {end}");
            }
        }
    }
    if let Some(decided) = decided {
        assert_eq!(ours, decided);
    }
    if let Some((name, alpn)) = theirs(data) {
        let hello = ours
            .expect("rustls takes it")
            .expect("rustls finds it whole");
        // rustls gives names in lower case, and none that is not a DNS name.
        if let Some(name) = name {
            assert!(hello.sni.is_some_and(|sni| sni.eq_ignore_ascii_case(&name)));
        }
        let offered: Vec<Vec<u8>> = hello.alpn.iter().map(|name| name.to_vec()).collect();
        assert_eq!(offered, alpn);
    }
});
