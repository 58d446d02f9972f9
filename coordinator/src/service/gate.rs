//! Who may ask for what: a role for each service, given by a certificate, a token, or both.

use std::sync::Arc;

use musher_security::{Role, Token};
use tonic::{Request, Status, service::Interceptor};

use super::door::{Caller, Door};

/// What callers must show.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Callers show certificates; TLS has verified them.
    pub certified: bool,
    /// Makes a worker.
    pub join: Option<Token>,
    /// Makes an operator.
    pub operator: Option<Token>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    NoToken,
    WrongToken,
    NotOperator,
}

impl Access {
    /// Nothing is asked of anybody.
    pub fn is_open(&self) -> bool {
        !self.certified && self.join.is_none() && self.operator.is_none()
    }

    /// Whether one with this certificate and this token may do what takes that role.
    pub fn judge(&self, needs: Role, certificate: Option<Role>, token: Option<&str>) -> Result<(), Refusal> {
        if self.is_open() || self.role(certificate, token)? >= needs {
            Ok(())
        } else {
            Err(Refusal::NotOperator)
        }
    }

    fn role(&self, certificate: Option<Role>, token: Option<&str>) -> Result<Role, Refusal> {
        let shows = |expected: &Option<Token>| {
            expected.as_ref().is_some_and(|expected| token.is_some_and(|token| expected.is(token)))
        };
        if certificate == Some(Role::Operator) || shows(&self.operator) {
            return Ok(Role::Operator);
        }
        match token {
            _ if shows(&self.join) => Ok(Role::Worker),
            // A token is asked for besides the certificate, if there is one to ask for.
            None if self.join.is_none() && self.certified => Ok(Role::Worker),
            None => Err(Refusal::NoToken),
            Some(_) => Err(Refusal::WrongToken),
        }
    }
}

impl Refusal {
    /// For tools.
    pub fn cause(self) -> &'static str {
        match self {
            Refusal::NoToken => "token_missing",
            Refusal::WrongToken => "token_wrong",
            Refusal::NotOperator => "not_an_operator",
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoToken => Status::unauthenticated("this run asks for a token: give --token-file FILE"),
            Refusal::WrongToken => Status::unauthenticated("the token is not one of this run's"),
            Refusal::NotOperator => Status::permission_denied(
                "this takes an operator: its token (server.operator_token_file), or a certificate with that role",
            ),
        }
    }
}

/// Stands before one service.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    pub door: Arc<Door>,
    pub needs: Role,
}

impl Interceptor for Gate {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let caller = caller.ok_or_else(|| Status::internal("the caller is not known"))?;
        let shown = request.metadata().get("authorization").and_then(|shown| shown.to_str().ok());
        let token = shown.and_then(|shown| shown.strip_prefix("Bearer "));
        match self.door.access.judge(self.needs, caller.role, token) {
            Ok(()) => {
                caller.known.is_welcome();
                Ok(request)
            }
            Err(refusal) => {
                self.door.turn_away(caller.address, refusal.cause());
                Err(refusal.into())
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use Role::{Operator, Worker};

    use super::*;

    const JOIN: &str = "join-join-join-join";
    const OPERATE: &str = "operate-operate-operate";

    fn token(text: &str) -> Option<Token> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Some(Token::read(file.path()).unwrap())
    }

    #[test]
    fn an_open_door_asks_nothing() {
        assert_eq!(Access::default().judge(Operator, None, None), Ok(()));
    }

    #[test]
    fn tokens_make_workers_and_operators() {
        let access = Access { certified: false, join: token(JOIN), operator: token(OPERATE) };
        assert_eq!(access.judge(Worker, None, Some(JOIN)), Ok(()));
        assert_eq!(access.judge(Operator, None, Some(JOIN)), Err(Refusal::NotOperator));
        assert_eq!(access.judge(Operator, None, Some(OPERATE)), Ok(()));
        assert_eq!(access.judge(Worker, None, Some(OPERATE)), Ok(()));
        assert_eq!(access.judge(Worker, None, None), Err(Refusal::NoToken));
        assert_eq!(access.judge(Worker, None, Some("something else")), Err(Refusal::WrongToken));
    }

    #[test]
    fn a_certificate_makes_a_worker_unless_a_token_is_asked_for_too() {
        let alone = Access { certified: true, ..Access::default() };
        assert_eq!(alone.judge(Worker, Some(Worker), None), Ok(()));
        assert_eq!(alone.judge(Operator, Some(Worker), None), Err(Refusal::NotOperator));
        assert_eq!(alone.judge(Operator, Some(Operator), None), Ok(()));
        let both = Access { join: token(JOIN), ..alone };
        assert_eq!(both.judge(Worker, Some(Worker), None), Err(Refusal::NoToken));
        assert_eq!(both.judge(Worker, Some(Worker), Some("something else")), Err(Refusal::WrongToken));
        assert_eq!(both.judge(Worker, Some(Worker), Some(JOIN)), Ok(()));
        assert_eq!(both.judge(Operator, Some(Operator), None), Ok(()));
    }
}
