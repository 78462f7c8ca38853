//! `Identity.Certify`: a certificate for whoever holds a valid token.

use std::sync::Arc;
use std::time::SystemTime;

use tonic::{Request, Response, Status};
use tracing::{info, warn};
use weft_api::proto::identity_server::Identity;
use weft_api::proto::{CertifyRequest, CertifyResponse};

use super::ca::{Authority, CertifyError};
use super::listener::ConnectionInfo;
use super::metrics::Metrics;

pub struct IdentityService {
    pub authority: Arc<Authority>,
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
        match self.authority.certify(&csr, &token, SystemTime::now()) {
            Ok((issued, claims)) => {
                self.metrics.certificates_issued.add(1);
                info!(
                    address,
                    namespace = claims.namespace,
                    service_account = claims.service_account,
                    not_after = issued.not_after,
                    "certificate issued"
                );
                Ok(Response::new(CertifyResponse {
                    chain: vec![issued.leaf.to_vec()],
                    roots: self.authority.roots(),
                    not_before: signed(issued.not_before),
                    not_after: signed(issued.not_after),
                }))
            }
            Err(error) => {
                self.metrics.certificates_refused.add(1);
                warn!(address, "certificate refused: {error}");
                let message = error.to_string();
                Err(match error {
                    CertifyError::Token(_) => Status::unauthenticated(message),
                    CertifyError::Csr(_) => Status::invalid_argument(message),
                    CertifyError::Ca(_) => Status::unavailable(message),
                })
            }
        }
    }
}

fn signed(seconds: u64) -> i64 {
    i64::try_from(seconds).unwrap_or(i64::MAX)
}
