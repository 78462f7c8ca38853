//! Workload tokens: who a workload is before it has a certificate. JWS (RFC 7515) in compact form,
//! ES256, with the claims of RFC 7519. The key is the authority's own and signs nothing else.

use std::time::{Duration, SystemTime};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
    UnparsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use weft_api::names::{CONTROL_PLANE_NAMESPACE, CONTROL_PLANE_SERVICE_ACCOUNT, TOKEN_AUDIENCE};

use super::folder::Folder;
use super::{CaError, unix};

const KEY_FILE: &str = "token.key.pem";
/// Clocks may differ by this much.
const LEEWAY_SECS: u64 = 60;
/// Longest token that is looked at, bytes.
const MAX_LEN: usize = 8 << 10;

/// Who a token is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    pub namespace: String,
    pub service_account: String,
    /// `<namespace>/<name>`, when the token is for one workload only.
    pub workload: Option<String>,
}

/// Why a token is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    #[error("it is empty; make one with `weft-control-plane token`")]
    Missing,
    #[error("it is not a signed token in compact form")]
    Malformed,
    #[error("it was not signed by this control plane; make one with its own --data-dir")]
    Signature,
    #[error("it has expired; make a new one with `weft-control-plane token`")]
    Expired,
    #[error("it is valid only later; set the clocks")]
    NotYet,
    #[error("it is for '{0}', not for this control plane")]
    Audience(String),
    #[error("it is for the control plane's own identity, which no workload may have")]
    Reserved,
    #[error("it is of the trust domain '{0}', not of this one")]
    TrustDomain(String),
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    typ: String,
}

#[derive(Serialize, Deserialize)]
struct Payload {
    /// The trust domain.
    iss: String,
    /// `<namespace>/<service account>`.
    sub: String,
    aud: String,
    iat: u64,
    exp: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    workload: Option<String>,
}

pub(super) struct TokenKey(EcdsaKeyPair);

impl TokenKey {
    /// Reads the key; the first time, makes it.
    pub(super) fn open(folder: &Folder) -> Result<Self, CaError> {
        let pem = match folder.read(KEY_FILE)? {
            Some(pem) => pem,
            None => {
                let pem = rcgen::KeyPair::generate()?.serialize_pem();
                folder.write(KEY_FILE, pem.as_bytes())?;
                pem
            }
        };
        let damaged = |reason: String| CaError::Damaged {
            place: folder.path(KEY_FILE).display().to_string(),
            reason,
        };
        let key = rcgen::KeyPair::from_pem(&pem).map_err(|error| damaged(error.to_string()))?;
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.serialized_der())
            .map(Self)
            .map_err(|error| damaged(error.to_string()))
    }

    pub(super) fn issue(
        &self,
        claims: &Claims,
        trust_domain: &str,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<String, CaError> {
        let payload = Payload {
            iss: trust_domain.to_owned(),
            sub: format!("{}/{}", claims.namespace, claims.service_account),
            aud: TOKEN_AUDIENCE.to_owned(),
            iat: unix(now),
            exp: unix(now).saturating_add(lifetime.as_secs()),
            workload: claims.workload.clone(),
        };
        let header = Header {
            alg: "ES256".to_owned(),
            typ: "JWT".to_owned(),
        };
        let encode = |json: Result<Vec<u8>, serde_json::Error>| {
            json.map(|json| URL_SAFE_NO_PAD.encode(json))
                .map_err(|_| CaError::Crypto)
        };
        let signed = format!(
            "{}.{}",
            encode(serde_json::to_vec(&header))?,
            encode(serde_json::to_vec(&payload))?
        );
        let signature = self
            .0
            .sign(&SystemRandom::new(), signed.as_bytes())
            .map_err(|_| CaError::Crypto)?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// Checks signature, audience, trust domain and times.
    pub(super) fn check(
        &self,
        token: &str,
        trust_domain: &str,
        now: SystemTime,
    ) -> Result<Claims, InvalidToken> {
        let token = token.trim();
        if token.is_empty() {
            return Err(InvalidToken::Missing);
        }
        if token.len() > MAX_LEN {
            return Err(InvalidToken::Malformed);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(InvalidToken::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(InvalidToken::Malformed)?;
        let decode = |part: &str| {
            URL_SAFE_NO_PAD
                .decode(part)
                .map_err(|_| InvalidToken::Malformed)
        };
        let signature = decode(signature)?;
        let header: Header =
            serde_json::from_slice(&decode(header)?).map_err(|_| InvalidToken::Malformed)?;
        if header.alg != "ES256" {
            return Err(InvalidToken::Signature);
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.0.public_key().as_ref())
            .verify(signed.as_bytes(), &signature)
            .map_err(|_| InvalidToken::Signature)?;
        // Nothing of the payload is believed before this point.
        let payload: Payload =
            serde_json::from_slice(&decode(payload)?).map_err(|_| InvalidToken::Malformed)?;
        if payload.aud != TOKEN_AUDIENCE {
            return Err(InvalidToken::Audience(payload.aud));
        }
        if payload.iss != trust_domain {
            return Err(InvalidToken::TrustDomain(payload.iss));
        }
        let now = unix(now);
        if now >= payload.exp {
            return Err(InvalidToken::Expired);
        }
        if now.saturating_add(LEEWAY_SECS) < payload.iat {
            return Err(InvalidToken::NotYet);
        }
        let (namespace, service_account) =
            payload.sub.split_once('/').ok_or(InvalidToken::Malformed)?;
        if (namespace, service_account) == (CONTROL_PLANE_NAMESPACE, CONTROL_PLANE_SERVICE_ACCOUNT)
        {
            return Err(InvalidToken::Reserved);
        }
        Ok(Claims {
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            workload: payload.workload,
        })
    }
}
