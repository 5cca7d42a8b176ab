//! What an operator asks of the cluster and of single nodes.

use std::time::SystemTime;

use super::Client;
use super::connection::{DialError, open_channel, timed};
use super::error::{Error, Failure};
use crate::proto::v1;
use crate::proto::v1::cluster_service_client::ClusterServiceClient;

/// A node of the cluster that is to be formed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMember {
    /// Its number; not 0.
    pub node_id: u64,
    /// `host:port` where the other nodes reach it.
    pub peer_address: String,
}

impl Client {
    /// Who leads, who belongs to the cluster and what time it is there, from whichever node
    /// answers first; the answer is that node's view.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when no endpoint answers within the timeout.
    pub async fn describe(&self) -> Result<v1::DescribeResponse, Error> {
        let asking = async {
            let connection = self.pool.connection().await?;
            connection.describe(self.timeout).await.map_err(into_error)
        };
        tokio::time::timeout(self.timeout, asking).await.unwrap_or_else(|_| {
            let why = self.pool.failures().map_or_else(String::new, |why| format!(": {why}"));
            Err(Error::unavailable(format!("no answer within {:?}{why}", self.timeout)))
        })
    }

    /// The state of the node at `endpoint` (`host:port`), and of no other.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`], naming the endpoint, when it does not answer within the timeout.
    pub async fn status(&self, endpoint: &str) -> Result<v1::StatusResponse, Error> {
        let asking = async {
            let channel = open_channel(endpoint, self.timeout).await?;
            let call = timed(v1::StatusRequest {}, self.timeout);
            Ok(ClusterServiceClient::new(channel).status(call).await?.into_inner())
        };
        let asked = tokio::time::timeout(self.timeout, asking).await;
        let late = |_| Err(DialError::late(self.timeout));
        asked.unwrap_or_else(late).map_err(|error| error.at(endpoint))
    }

    /// Has the leader, at `endpoint`, set the cluster's time forward to `time`, or to its own wall
    /// clock: a leap, which ends sessions whose deadline lies before it and which nothing undoes.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with reason `NOT_LEADER` when another node leads, and
    /// [`Error::InvalidArgument`] for a time beyond the leader's wall clock.
    pub async fn set_time(
        &self,
        endpoint: &str,
        time: Option<SystemTime>,
    ) -> Result<v1::SetTimeResponse, Error> {
        let channel = open_channel(endpoint, self.connect_timeout)
            .await
            .map_err(|error| error.at(endpoint))?;
        let request = v1::SetTimeRequest { time: time.map(prost_types::Timestamp::from) };
        let call = ClusterServiceClient::new(channel).set_time(timed(request, self.timeout)).await;
        call.map(tonic::Response::into_inner)
            .map_err(|status| into_error(Failure::from_status(&status)))
    }

    /// Forms a cluster of nodes that were started without knowing of one another, by way of the
    /// first endpoint that can be reached. Returns the new cluster's id.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with reason `ALREADY_INITIALIZED` when any of them has been part of a
    /// cluster before; [`Error::Unavailable`] when no endpoint can be reached, and
    /// [`Error::OutcomeUnknown`] when one could but did not answer.
    pub async fn initialize(&self, members: Vec<NewMember>) -> Result<String, Error> {
        let members = members.into_iter().map(|member| v1::Member {
            node_id: member.node_id,
            peer_address: member.peer_address,
            ..v1::Member::default()
        });
        let request = v1::InitializeRequest { members: members.collect() };
        let mut last = Error::unavailable("there is no endpoint");
        for address in self.pool.addresses() {
            match open_channel(&address, self.connect_timeout).await {
                Ok(channel) => {
                    let mut client = ClusterServiceClient::new(channel);
                    // The server has its deadline; should it miss it, this is ours.
                    let call = client.initialize(timed(request, self.timeout));
                    let answered = tokio::time::timeout(self.timeout, call).await;
                    let unknown = |message| Err(Error::OutcomeUnknown { message });
                    return match answered {
                        Ok(Ok(answer)) => Ok(answer.into_inner().cluster_id),
                        Ok(Err(status)) => Err(match Failure::from_status(&status) {
                            Failure::Unknown(error) => {
                                Error::OutcomeUnknown { message: error.to_string() }
                            }
                            failure => into_error(failure),
                        }),
                        Err(_) => unknown(format!("{address} did not answer")),
                    };
                }
                Err(error) => last = error.at(&address),
            }
        }
        Err(last)
    }
}

fn into_error(failure: Failure) -> Error {
    match failure {
        Failure::Final(error)
        | Failure::NotApplied { error, .. }
        | Failure::NotSent(error)
        | Failure::Pending(error)
        | Failure::Unknown(error) => error,
    }
}
