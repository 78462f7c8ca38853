//! Who a workload is before it has a certificate, by the token it shows.
//!
//! Beside a folder, tokens are our own ([`Authority::check_token`]). On Kubernetes they are those of
//! service accounts, projected into the pod for our audience, and the apiserver says whose they are
//! (TokenReview): that the pod and the account still exist is thereby checked too. An answer is not
//! kept: certificates are asked for twice in their life.

use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::Api;
use kube::api::PostParams;
use weft_api::names::{CONTROL_PLANE_NAMESPACE, CONTROL_PLANE_SERVICE_ACCOUNT, TOKEN_AUDIENCE};

use super::ca::{Authority, Claims, InvalidToken};
use crate::cluster::{Cluster, ClusterError, answer};

/// What begins the user name of a service account.
const SERVICE_ACCOUNT: &str = "system:serviceaccount:";
/// Name of the pod a token is bound to, among what the apiserver says of its user.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
/// Longest token that is sent on, bytes.
const MAX_LEN: usize = 16 << 10;

/// Why a token says nothing.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Of our own.
    #[error("the token is not accepted: {0}")]
    Invalid(#[from] InvalidToken),
    #[error("the token is not accepted: {0}")]
    Refused(String),
    /// It may be good: try again.
    #[error("the token cannot be reviewed now: {0}")]
    Unavailable(#[from] ClusterError),
}

/// Checks tokens.
pub enum Authenticator {
    /// Tokens of our own.
    Own(Arc<Authority>),
    /// Tokens of service accounts.
    Kubernetes(Cluster),
}

impl Authenticator {
    /// Says whose a token is.
    ///
    /// # Errors
    /// It is not accepted, or nobody can say now.
    pub async fn check(&self, token: &str, now: SystemTime) -> Result<Claims, TokenError> {
        match self {
            Self::Own(authority) => Ok(authority.check_token(token, now)?),
            Self::Kubernetes(cluster) => review(cluster, token.trim()).await,
        }
    }
}

async fn review(cluster: &Cluster, token: &str) -> Result<Claims, TokenError> {
    if token.is_empty() {
        return Err(TokenError::Refused("it is empty".to_owned()));
    }
    if token.len() > MAX_LEN {
        return Err(TokenError::Refused(format!(
            "it is longer than {MAX_LEN} bytes"
        )));
    }
    let review = TokenReview {
        spec: TokenReviewSpec {
            token: Some(token.to_owned()),
            audiences: Some(vec![TOKEN_AUDIENCE.to_owned()]),
        },
        ..TokenReview::default()
    };
    let reviews = Api::<TokenReview>::all(cluster.client.clone());
    let parameters = PostParams::default();
    let asked = reviews.create(&parameters, &review);
    let review = answer("review a token".to_owned(), asked).await?;
    claims(&review).map_err(TokenError::Refused)
}

/// What the apiserver's answer says; why it is not enough, as a sentence.
fn claims(review: &TokenReview) -> Result<Claims, String> {
    let status = review.status.clone().unwrap_or_default();
    if status.authenticated != Some(true) {
        let why = status.error.filter(|why| !why.is_empty());
        return Err(format!(
            "the apiserver does not know it ({}); mount a projected service account token with the audience {TOKEN_AUDIENCE}",
            why.as_deref()
                .unwrap_or("expired, or not one of this cluster's"),
        ));
    }
    // An apiserver that does not know of audiences says none: then it is for the apiserver itself.
    let audiences = status.audiences.unwrap_or_default();
    if !audiences.iter().any(|audience| audience == TOKEN_AUDIENCE) {
        return Err(format!(
            "it is for {}, not for {TOKEN_AUDIENCE}",
            match audiences.as_slice() {
                [] => "the apiserver".to_owned(),
                some => some.join(", "),
            }
        ));
    }
    let UserInfo {
        username, extra, ..
    } = status.user.unwrap_or_default();
    let username = username.unwrap_or_default();
    let account = username
        .strip_prefix(SERVICE_ACCOUNT)
        .and_then(|rest| rest.split_once(':'))
        .filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty())
        .ok_or_else(|| format!("it is of '{username}', which is no service account"))?;
    let (namespace, service_account) = account;
    if account == (CONTROL_PLANE_NAMESPACE, CONTROL_PLANE_SERVICE_ACCOUNT) {
        return Err(InvalidToken::Reserved.to_string());
    }
    let pod = extra
        .unwrap_or_default()
        .remove(POD_NAME)
        .and_then(|names| names.into_iter().next());
    Ok(Claims {
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        workload: pod.map(|pod| format!("{namespace}/{pod}")),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn said(status: Value) -> Result<Claims, String> {
        let review = json!({ "metadata": {}, "spec": {}, "status": status });
        claims(&serde_json::from_value(review).unwrap())
    }

    fn good(username: &str) -> Value {
        json!({
            "authenticated": true, "audiences": [TOKEN_AUDIENCE],
            "user": { "username": username, "uid": "1", "groups": ["system:serviceaccounts"],
                      "extra": { POD_NAME: ["cart-1"] } },
        })
    }

    #[test]
    fn a_reviewed_token_names_an_account() {
        let claims = said(good("system:serviceaccount:shop:cart")).unwrap();
        assert_eq!(
            (claims.namespace.as_str(), claims.service_account.as_str()),
            ("shop", "cart")
        );
        assert_eq!(claims.workload.as_deref(), Some("shop/cart-1"));
    }

    #[test]
    fn what_is_not_enough_is_refused() {
        let with = |key: &str, value: Value| {
            let mut status = good("system:serviceaccount:shop:cart");
            status[key] = value;
            status
        };
        for (status, why) in [
            (json!({}), "does not know it"),
            (
                json!({ "error": "[invalid bearer token]" }),
                "[invalid bearer token]",
            ),
            (with("authenticated", json!(false)), "does not know it"),
            // One that was reviewed for the apiserver's own audience.
            (with("audiences", json!([])), "for the apiserver"),
            (
                with("audiences", json!(["https://kubernetes.default.svc"])),
                "default.svc",
            ),
            (good("system:admin"), "no service account"),
            (good("system:serviceaccount:shop"), "no service account"),
            (good("system:serviceaccount::cart"), "no service account"),
            (
                good("system:serviceaccount:weft-system:weft-control-plane"),
                "own identity",
            ),
            (with("user", Value::Null), "no service account"),
        ] {
            let error = said(status.clone()).unwrap_err();
            assert!(error.contains(why), "{status}: {error}");
        }
    }
}
