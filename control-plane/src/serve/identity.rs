//! `Identity.Certify`: a certificate for whoever holds a valid token.
//!
//! A token that is refused is UNAUTHENTICATED, with why; when nobody can say now (the apiserver is
//! away) it is UNAVAILABLE, and the proxy goes on with the certificate it has and asks again.

use std::sync::Arc;
use std::time::SystemTime;

use tonic::{Request, Response, Status};
use tracing::{info, warn};
use weft_api::proto::identity_server::Identity;
use weft_api::proto::{CertifyRequest, CertifyResponse};

use super::authenticate::{Authenticator, TokenError};
use super::ca::{Authority, CertifyError, Claims, Issued};
use super::listener::ConnectionInfo;
use super::metrics::Metrics;

pub struct IdentityService {
    pub authority: Arc<Authority>,
    pub authenticator: Authenticator,
    pub metrics: Arc<Metrics>,
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn certify(
        &self,
        request: Request<CertifyRequest>,
    ) -> Result<Response<CertifyResponse>, Status> {
        let address = request
            .extensions()
            .get::<ConnectionInfo>()
            .map_or(String::new(), |info| info.address.to_string());
        let CertifyRequest { csr, token } = request.into_inner();
        match self.issue(&csr, &token).await {
            Ok((issued, claims)) => {
                self.metrics.certificates_issued.add(1);
                info!(
                    address,
                    namespace = claims.namespace,
                    service_account = claims.service_account,
                    workload = claims.workload,
                    not_after = issued.not_after,
                    "certificate issued"
                );
                Ok(Response::new(CertifyResponse {
                    chain: issued
                        .full_chain()
                        .iter()
                        .map(|certificate| certificate.to_vec())
                        .collect(),
                    roots: self.authority.roots(),
                    not_before: signed(issued.not_before),
                    not_after: signed(issued.not_after),
                }))
            }
            Err(status) => {
                self.metrics.certificates_refused.add(1);
                warn!(address, "certificate refused: {}", status.message());
                Err(status)
            }
        }
    }
}

impl IdentityService {
    async fn issue(&self, csr: &[u8], token: &str) -> Result<(Issued, Claims), Status> {
        let now = SystemTime::now();
        let checked = self.authenticator.check(token, now).await;
        let claims = checked.map_err(|error| match error {
            TokenError::Invalid(_) | TokenError::Refused(_) => {
                Status::unauthenticated(error.to_string())
            }
            TokenError::Unavailable(_) => {
                self.metrics.token_reviews_failed.add(1);
                Status::unavailable(error.to_string())
            }
        })?;
        let issued = self
            .authority
            .sign(csr, &claims, now)
            .map_err(|error| match error {
                CertifyError::Token(_) => Status::unauthenticated(error.to_string()),
                CertifyError::Csr(_) => Status::invalid_argument(error.to_string()),
                CertifyError::Ca(_) => Status::unavailable(error.to_string()),
            })?;
        Ok((issued, claims))
    }
}

fn signed(seconds: u64) -> i64 {
    i64::try_from(seconds).unwrap_or(i64::MAX)
}
